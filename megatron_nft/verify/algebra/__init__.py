"""Our own algebra of answers: normalise the spelling, read it as a tree, compare two trees by structure and value."""
