"""The commands, one file each: its options, and its work. Loaded one by one, when they are called."""
