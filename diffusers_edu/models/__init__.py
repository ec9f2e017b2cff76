"""The models of the ladder, one self-sufficient file each."""
