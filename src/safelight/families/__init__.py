"""Model families, one folder each. A family is found by being here; nothing else names it."""
