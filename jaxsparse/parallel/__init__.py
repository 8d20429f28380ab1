"""Tables, ids and gradients over several devices."""
