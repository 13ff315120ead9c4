"""WebUIs as hosts: what they share (`host`), and what is A1111's (`a1111`) or the Forge family's (`forge`) own."""
