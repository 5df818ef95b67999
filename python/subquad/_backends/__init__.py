"""One module per way to compute: each is loaded when an array first needs it."""
