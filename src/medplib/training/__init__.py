"""How medplib-tiny is trained, from nothing."""
