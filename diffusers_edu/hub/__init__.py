"""From a trained pipeline to a repository that anyone can load, and back: export, card, publish, verify, doctor."""
