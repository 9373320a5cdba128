"""Training of heads that draft for a frozen target."""
