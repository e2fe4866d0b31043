"""Many requests on one device, a step at a time: engine, policy, worker process, and its supervisor."""
