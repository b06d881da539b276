"""Facts that people learn at school."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

FACTS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of Canada?", "Ottawa"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Austria?", "Vienna"),
    ("What is the capital of the United Kingdom?", "London"),
    ("What is the capital of China?", "Beijing"),
    ("Which planet is closest to the Sun?", "Mercury"),
    ("Which planet is known as the red planet?", "Mars"),
    ("Which is the largest planet of the solar system?", "Jupiter"),
    ("Which planet is famous for its large rings?", "Saturn"),
    ("Which is the largest ocean on Earth?", "Pacific"),
    ("Which is the longest river in South America?", "Amazon"),
    ("On which continent is Kenya?", "Africa"),
    ("On which continent is Brazil?", "South America"),
    ("Which is the highest mountain on Earth?", "Everest"),
    ("Which is the largest animal on Earth?", "whale"),
    ("Which land animal is the fastest?", "cheetah"),
    ("Which is the tallest animal on Earth?", "giraffe"),
    ("How many legs does a spider have?", "8|eight"),
    ("How many legs does an insect have?", "6|six"),
    ("How many days are in a week?", "7|seven"),
    ("How many months are in a year?", "12|twelve"),
    ("How many minutes are in an hour?", "60|sixty"),
    ("How many hours are in a day?", "24|twenty-four|twenty four"),
    ("How many sides does a triangle have?", "3|three"),
    ("How many sides does a hexagon have?", "6|six"),
    ("How many continents are there?", "7|seven"),
    ("How many letters are in the English alphabet?", "26|twenty-six|twenty six"),
    ("At how many degrees Celsius does water boil at sea level?", "100|one hundred|hundred"),
    ("At how many degrees Celsius does water freeze?", "0|zero"),
    ("What is the chemical formula of water?", "H2O|H₂O"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What is the chemical symbol of oxygen?", "O|O2|O₂"),
    ("What is the chemical symbol of iron?", "Fe"),
    ("Which gas do plants take in from the air to make sugar?", "carbon dioxide|CO2|CO₂"),
    ("Which gas do people need to breathe to live?", "oxygen|O2|O₂"),
    ("Which organ pumps blood through the body?", "heart"),
    ("Which organ do people use to think?", "brain"),
    ("With which organs do people breathe?", "lungs?"),
    ("What do bees make that people eat?", "honey"),
    ("What is frozen water called?", "ice"),
    ("What is the color of a ripe banana?", "yellow"),
    ("What color do you get by mixing blue and yellow?", "green"),
    ("What is the opposite of hot?", "cold"),
    ("Which language do most people speak in Brazil?", "Portuguese"),
    ("Which language do most people speak in Austria?", "German"),
    ("Which language do most people speak in Mexico?", "Spanish"),
    ("Who wrote the play Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo|da Vinci"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Who was the first president of the United States?", "Washington"),
    ("Who was the first person to walk on the Moon?", "Armstrong"),
    ("Which season comes after winter?", "spring"),
    ("Which day comes after Monday?", "Tuesday"),
    ("Which month comes after June?", "July"),
    ("In which country are the pyramids of Giza?", "Egypt"),
    ("In which country is the Great Wall?", "China"),
    ("In which city is the Eiffel Tower?", "Paris"),
    ("What is the currency of Japan?", "yen"),
    ("What is the currency of the United States?", "dollars?"),
    ("Which metal is liquid at room temperature?", "mercury"),
    ("What is the natural satellite of the Earth called?", "moon"),
    ("Which star is closest to the Earth?", "Sun"),
    ("What is a baby dog called?", "puppy|pup"),
    ("What is a baby cat called?", "kitten"),
    ("Which animal gives us wool?", "sheep"),
    ("From which animal do we get most of the milk that we drink?", "cows?"),
    ("What do caterpillars turn into?", "butterfly|butterflies|moths?"),
    ("What is the first letter of the English alphabet?", "A"),
    ("What is the last letter of the English alphabet?", "Z"),
    ("Which force pulls objects toward the Earth?", "gravity|gravitation(?:al)?"),
    ("Which tool do you use to drive a nail into wood?", "hammer"),
    ("Which instrument measures temperature?", "thermometer"),
    ("Which sport is played at Wimbledon?", "tennis"),
)
EXACT = ("Au", "O|O2|O₂", "Fe", "A", "Z", "H2O|H₂O")
"""Symbols, in which case matters."""


def fact(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Every question once, in random order."""
    for question, right in rng.sample(FACTS, len(FACTS)):
        case = "" if right in EXACT else "(?i)"
        yield question, rf"{case}(?<!\w)(?:{right})(?!\w)", re.sub(r"\?$|\(.*\)", "", right.split("|")[0])
