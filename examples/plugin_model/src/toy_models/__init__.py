"""Two toy models for Safelight. Importing this registers them, and imports no torch."""

from safelight import register_configs

for name in ("ToyPipeline", "ToyVariationPipeline"):
    register_configs(model_family="toy", pipeline_name=name, hf_model_paths=[], package="toy_models")
