"""The commands of ``diffsparse``, a module each."""
