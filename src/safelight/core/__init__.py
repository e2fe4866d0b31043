"""The contracts: parameters, requests, stages, pipelines, the registry and the executor."""
