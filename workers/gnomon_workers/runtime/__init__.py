"""What every actor needs: the protocol with the dispatcher, reports, gangs, places to fail at, scratch space."""
