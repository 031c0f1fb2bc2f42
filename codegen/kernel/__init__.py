"""From an op's meaning to loops: what a kernel of any target loads, computes, reduces and stores, in which order."""
