"""Stage 3: a cartridge and questions -> its report card, and what it may be served together with."""
