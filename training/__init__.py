"""How the model that ships with Safelight was trained: one coloured shape on a background."""
