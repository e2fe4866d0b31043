"""Many requests on one device, a step at a time: workers, what watches them, and what goes between the two."""
