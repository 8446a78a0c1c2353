"""The complete detector: composes the stages of the algorithm on one or many devices."""
