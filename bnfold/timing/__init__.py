"""How fast files and models run: in pairs, each contestant in a process of its own."""
