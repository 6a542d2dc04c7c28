"""The networks of CLAN: generator G (CLAN_G) and discriminator D (CLAN_D)."""
