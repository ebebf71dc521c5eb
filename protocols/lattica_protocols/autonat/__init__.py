"""AutoNAT: others try whether they can connect with us. Version 2 both ways; version 1 for those who ask us."""
