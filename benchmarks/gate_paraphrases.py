"""Real problems reworded by hand, sentence by sentence, as another person would put them."""

from __future__ import annotations

PARAPHRASES: dict[str, str] = {
    "gsm8k-test-0051": (
        "A ship that belongs to Tom does 10 miles an hour. Tom sails it from 1 PM until 4 PM, and on the way back he "
        "only makes 6 mph. How many hours does the return trip last?"
    ),
    "gsm8k-test-0054": (
        "Seven kittens from the animal shelter in town are in the car with the Doubtfire sisters when a call from "
        "their mother comes: both cats at home have become mothers. Patchy had three times as many kittens as the "
        "sisters adopted, and Trixie had 12. What is the number of kittens the family owns now?"
    ),
    "gsm8k-test-0061": (
        "For her daughter, Janet orders a brooch. The material costs her $500, and the jeweler who makes it charges "
        "$800 more. Insurance then comes to 10% of that sum. What does she pay altogether?"
    ),
    "gsm8k-test-0065": (
        "Three times a week Jim watches TV for 2 hours and afterwards reads in bed for half that time. Over 4 weeks, "
        "how many hours go into TV and reading?"
    ),
    "gsm8k-test-0088": (
        "Harald's record sold a tenth of the copies that Marilyn's first record sold. Together they sold 88,000. "
        "How many of those were Harald's?"
    ),
    "gsm8k-test-0135": (
        "Bobby, a friend of Brian, owns 5 video games fewer than three times Brian's number. Brian had 20, but 5 of "
        "them got lost just before they compared. How many video games does Bobby own?"
    ),
    "gsm8k-test-0142": (
        "Every day Jordan spends 2 hours on video games. His part-time job pays $10 per hour. If he worked during "
        "those hours instead, what would he make in a week?"
    ),
    "gsm8k-test-0178": (
        "Bo has 40 crabs. Monic has 4 fewer than Bo, and Rani has ten more than Monic. How many crabs do they have "
        "in total?"
    ),
    "gsm8k-test-0191": (
        "To survive, a duck must eat 3.5 pounds of insects a week. How many pounds a day does a flock of ten need?"
    ),
    "gsm8k-test-0285": "Ann is 9. Her brother is twice as old as she is. What will his age be three years from now?",
    "gsm8k-test-0326": (
        "A bus left the terminal with some people. 5 more boarded at the first stop; at the second, 7 got off and 8 "
        "got on. On the way to the third stop there were 20 people on it. How many had boarded at the terminal?"
    ),
    "gsm8k-test-0393": (
        "Carol needs 4 hours to write a song, half of that to record it, and 90 minutes to edit it. Which percentage "
        "of the whole time was editing?"
    ),
    "gsm8k-test-0435": (
        "Out of 25 lollipops Ray kept 5 for himself. He gave the others to his four friends, the same number to "
        "each. How many did one friend get?"
    ),
    "gsm8k-test-0440": (
        "Billie's bedroom is a rectangle with an area of 360 square feet. One side is 3 yards long. How many feet is "
        "it all the way around?"
    ),
    "gsm8k-test-0476": (
        "Sarah paid $300 for books at $15 apiece. She divided them evenly among her 4 children. How many books did "
        "each of them receive?"
    ),
    "gsm8k-test-0542": (
        "Verna, who loves fruit, bought three apples for $1.50 each, five oranges for $0.80 each, and six peaches for "
        "$0.75 each. She paid with $20. How much did she get back?"
    ),
    "gsm8k-test-0548": (
        "During an illness of 3 months Mark lost 10 pounds every month. In the end he weighed 70 pounds. How much "
        "had he weighed before?"
    ),
    "gsm8k-test-0600": (
        "Jamaal trains with an 8-pound weight at the gym. He goes up by 50%, but that is too heavy, so he takes one "
        "that is two pounds lighter. How many pounds is the weight he uses now?"
    ),
    "gsm8k-test-0704": (
        "$100 was shared between Gerald and Julia at 3:2. After buying a book for $10, how much does Gerald have?"
    ),
    "gsm8k-test-0758": "A bag is priced at $140 and there is a 5% discount. What do you have to pay for it?",
    "gsm8k-test-0775": (
        "Henry is putting together toys: 57 cars, which need 4 wheels each, and 73 motorcycles, which need 2 wheels "
        "each. His box holds 650 wheels. How many will he have left over?"
    ),
    "gsm8k-test-0946": (
        "Last Friday Sam had seventy loaves of bread. A bakery has seven times that number, less 40. How many loaves "
        "are at the bakery?"
    ),
    "gsm8k-test-1034": (
        "With $200 in his pocket Ted buys 3 books at 16 dollars and 3 pencils at 6 dollars apiece. What does he spend?"
    ),
    "gsm8k-test-1098": (
        "Mike is 24. His girlfriend Martha is 4 years younger than he is, and her brother Jeff is 10 years older than "
        "Martha. What is Jeff's age?"
    ),
    "gsm8k-test-1232": (
        "Eve had 20 pieces of pomelo. She gave some to a friend and still has 1/4 of what she had at first. How many "
        "pieces did the friend get?"
    ),
    "gsm8k-test-1300": (
        "Josh's car shop is closed on Sunday and Wednesday and open on the other days. He services 3 cars a day at "
        "$4 each. What are his earnings over 2 weeks?"
    ),
}
