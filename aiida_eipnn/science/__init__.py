"""The science: configurations, labels, EIPs and networks. No AiiDA; eV, Å, eV/Å, eV/Å³."""
