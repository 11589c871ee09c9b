"""The text that a model reads when it is calibrated: prose of several kinds, written for this purpose."""

TEXT = """\
The harbor town of Lindholm lies on the west side of a narrow bay. In the eighteenth century its people \
lived from fishing and from the repair of ships. A storm in 1791 broke the old sea wall, and for nine \
years the lower streets flooded every spring. When the new wall was finished, the council wrote a short \
report: "The wall is 412 meters long and 3.5 meters high. It cost 18,240 crowns, of which the merchants \
paid two thirds." Visitors still read these words on a stone beside the market.

Marta closed the door and listened. Nobody was on the stairs. She counted to twenty, as her brother had \
taught her, and then opened the letter. It had no date and no name. "You do not know me," it began, "but I \
knew your father well, and I owe him more than I can say." She read the page twice, put the letter into \
her coat and walked down to the river, where the last boats were leaving. What could a stranger want from \
her after all these years?

A heat pump moves heat from a cold place to a warm place. It contains a liquid that boils at a low \
temperature. First, the liquid takes heat from the air outside and becomes a gas. Second, a compressor \
raises the pressure of the gas, so that its temperature rises too. Third, the hot gas gives its heat to \
the water of the house and becomes liquid again. For every unit of electricity, a good pump delivers three \
to four units of heat. In very cold weather this number falls, because the difference between outside and \
inside is larger.

To make bread for four people you need:
- 500 g of flour
- 330 ml of warm water
- 10 g of salt
- 7 g of dry yeast
Mix the flour and the salt. Dissolve the yeast in the water, wait five minutes, and add it slowly. Knead \
the dough for ten minutes, cover it, and let it rest for an hour. Then bake it at 230 degrees Celsius \
until the crust is brown.

def mean(numbers):
    # Return the mean of a list of numbers, or None if the list is empty.
    if not numbers:
        return None
    total = 0.0
    for number in numbers:
        total += number
    return total / len(numbers)

Question: A train leaves at 09:15 and arrives at 11:40. How long does the journey take?
Answer: From 09:15 to 11:15 there are two hours, and from 11:15 to 11:40 there are 25 minutes. The journey \
takes two hours and 25 minutes.

In the second half the home team played with more patience. Okafor scored after 58 minutes with a header \
from close range, and only four minutes later Lindqvist hit the post. The visitors, who had lost just once \
in eleven games, changed two players and pressed hard, but the defense held. "We were not better than they \
were," the coach said afterwards. "We were calmer." With 41 points from 20 games the club is now third in \
the table.

The parties agree as follows. The seller delivers the goods within thirty days of the order. If the seller \
cannot deliver in time, the buyer may cancel the order in writing and receives the full price back. \
Neither party is liable for delays that result from war, strikes, or natural disasters. This agreement is \
governed by the laws of the country in which the seller is registered.

Dear Professor Ahmadi, thank you for your comments on my draft. I have changed the third chapter as you \
suggested: the experiment with 64 plants now stands before the one with 16, and the table shows the \
standard error of each mean. I did not find the source of the figure on page 27. Could you tell me where \
you read it? Kind regards, Jonas.
"""
