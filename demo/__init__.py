"""The whole way in minutes on a CPU, with stand-ins that say so."""
