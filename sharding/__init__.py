"""Device meshes and placement."""
