"""Networks: providers of ports, each a plug-in."""
