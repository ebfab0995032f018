"""The operator's routes, and warming up."""
