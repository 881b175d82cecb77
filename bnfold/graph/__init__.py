"""A module -> a functional program (torch.export), the editor that passes share, and its runs in float64."""
