"""Video models: a file for each family, on shared ground."""
