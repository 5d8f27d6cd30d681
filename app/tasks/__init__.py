"""Steps that are not those from inputs to targets."""
