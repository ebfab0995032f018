"""The command line: one file per command, thin. Everything of substance is below."""
