"""Steps compiled for accelerators that are not here, and what the compiled programs have in them."""
