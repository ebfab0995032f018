"""Methods that answer: in how many bytes? One file each."""
