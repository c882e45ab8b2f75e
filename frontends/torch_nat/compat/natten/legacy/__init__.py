"""What the interfaces of several old releases of NATTEN share."""
