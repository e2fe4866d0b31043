"""Each promise, a small change to the source that breaks it, and the test that must see it."""
