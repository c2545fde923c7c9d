"""Transports between leaders: one protocol of four verbs, `memory` and `flight`, and the shaping that imitates a WAN."""
