"""A source -> a module, its weights and its example inputs."""
