"""BatchNorms' numbers: their health, their statistics measured over data, ranges."""
