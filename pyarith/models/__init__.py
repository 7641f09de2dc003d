"""Model families as data, and the modules and weights of a model that a family names."""
