"""Methods that answer: how many tokens in a step? One file each."""
