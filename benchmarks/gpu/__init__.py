"""``make gpu``: what a GPU that is there for a few minutes can tell, in stages that end in time whatever fails."""
