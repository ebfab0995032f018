"""Methods that answer: how does stored KV come back? One file each."""
