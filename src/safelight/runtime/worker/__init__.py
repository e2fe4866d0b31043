"""What lives in the worker: the engine, which chooses and makes each unit, and the process that has it."""
