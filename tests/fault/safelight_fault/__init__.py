"""A family of pipelines that fail on demand, for tests of the server alone."""
