"""The pipelines, one self-sufficient file each: what is imported here is also what is shipped beside the weights."""
