"""Methods that answer: whose KV may stand in for computing it? One file each."""
