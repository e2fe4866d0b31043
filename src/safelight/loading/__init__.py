"""From a model repository on disk, or on the Hub, to a pipeline that runs."""
