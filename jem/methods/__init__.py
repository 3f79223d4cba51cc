"""Joint embedding methods, one file each."""
