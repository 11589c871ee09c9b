"""Texts that a model reads when it is calibrated, of several kinds, written for this purpose.

Moments are measured on `TEXTS`. The loss of widths is measured on `CHECK`, which is none of them.
"""

PROSE = """\
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
"""

KINDS = """\
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

MARKUP = """\
<article id="p-204" lang="en">
  <h2>Opening hours of the <em>Marine Museum</em></h2>
  <p>From <time datetime="2019-04-01">1 April</time> to 30 September the museum is open from 10 a.m. to 6 \
p.m.; in winter it closes at 4 p.m. Admission: &pound;6.50 (<a href="/tickets?group=2">groups</a>: \
&pound;4).</p>
  <ul>
    <li><b>Room 1</b>: the harbor of Tarn in 1790</li>
    <li><b>Room 2</b>: <i>knots</i>, nets and <code>unknown</code> tools</li>
  </ul>
  <!-- the café stays closed on Mondays -->
</article>

{"name": "buoy-17", "position": [54.31, -3.08], "depth": 12.5, "active": true, "notes": null, "log": \
[{"time": "06:40", "wind": 14, "wave": 0.8}, {"time": "07:10", "wind": 17, "wave": 1.1}]}

SELECT name, MAX(wave) AS highest FROM buoys JOIN log ON buoys.id = log.buoy
WHERE active = 1 AND wave > 0.5 GROUP BY name ORDER BY highest DESC LIMIT 10;
"""

#: Articles of the kind that an encyclopedia has, invented.
RAILWAY = """\
The Marrick Valley Railway was a narrow gauge line in the north of England that ran for 19.3 kilometers \
from Ellerby Bridge to the lead mines at Hurstgill. Its engineer, Josiah Penhallow, surveyed the route \
in 1867; Parliament passed the act on 12 July 1869, and the first train, drawn by the locomotive Swale, \
reached Hurstgill on 2 October 1872. The line climbed 214 meters, crossed the River Arkle on a viaduct \
of seven arches and needed two reversals below Crackpot Moor. At its height, in 1881, it carried 41,600 \
tons of ore and 23,000 passengers a year. When the Old Gang and Sir Francis mines closed, its income \
fell to 1,140 pounds, and the North Eastern Railway bought it in May 1896 for a third of its cost. \
Penhallow's son Edwin, then manager, ran excursions from Darlington, with a brass band in an open wagon, \
until a landslide buried the upper reversal on 9 November 1911. Swale was scrapped at Shildon; her \
sister Arkle worked at a brickyard near Ripon until 1937 and is now in the museum at Beamish. The \
viaduct, a listed monument since 1967, appears in the film The Fell Road (1974) and on the label of \
Penhallow Ale, which the brewery of Marrick has sold since 1989. Since 2006 a footpath follows the line \
from Ellerby Bridge to the fourth arch.
"""

BATTLE = """\
The Battle of Kessin Ford was fought on 23 August 1644 between a Swedish army under Count Johan Ribbing and \
an Imperial army under General Melchior von Traun. It was the last large engagement of the Pomeranian \
campaign. Traun, whose 9,500 infantry and 4,200 cavalry had marched from Stettin in six days, reached the \
river Recke on the evening of 21 August and found the bridge at Kessin burned. On the next morning his \
engineers began to build a causeway of boats, but the Swedish artillery (twelve guns, commanded by Colonel \
Erik Stake) destroyed it twice. At dawn on 23 August the Imperial right wing, led by the Duke of Wallhof, \
forded the river 3 kilometers upstream, drove two regiments of dragoons from the village of Damm and turned \
towards the rear of Ribbing's camp. Ribbing, who had only 8,100 men, left 1,500 musketeers at the ford and \
attacked the duke before Traun could cross. The cavalry met three times between nine and eleven o'clock; \
Wallhof was shot in the throat at the third charge, and his troops fled into the marsh. By the time that \
Traun's infantry had crossed, the Swedes held the hill of St. Jürgen, and he withdrew after dark. The \
Imperial army lost about 3,400 men, 17 standards and its baggage, the Swedish army 1,150. Although Ribbing \
claimed a complete victory, he was unable to pursue: "I have won a field," he reported to the chancellor, \
"and not one loaf of bread."
"""

HURRICANE = """\
Hurricane Lenora was the fourteenth named storm and the third major hurricane of the 1988 Atlantic season. \
It developed from a tropical wave that left the coast of Senegal on September 11 and became a tropical \
depression on September 15, about 425 miles (685 km) east of Barbados. Moving west at 17 mph (28 km/h), the \
depression strengthened into Tropical Storm Lenora on the following day. After a reconnaissance aircraft \
had reported an eye 12 miles wide, Lenora was upgraded to a hurricane at 1800 UTC on September 17; it \
reached its peak intensity, with winds of 125 mph (205 km/h) and a pressure of 948 mbar, south of \
Hispaniola. The storm made landfall near Santa Rosa del Mar on September 20 and dissipated over the \
mountains two days later. Lenora killed 63 people and caused damage of 410 million dollars. On the island \
of Saint Amand, winds of 92 mph destroyed 1,340 houses and nearly the whole banana crop; in the capital, \
Port Clarence, the storm surge rose to 9.5 ft (2.9 m) and sank 27 fishing boats. Heavy rainfall, which \
peaked at 21.4 inches at Los Cedros, led to mudslides that cut the road between Los Cedros and the coast \
for eleven weeks. The government declared a state of emergency, and the Red Cross opened 46 shelters for \
18,500 people. Because of its effects, the name Lenora was retired in the spring of 1989 and was replaced \
by Lucille for the 1994 season.
"""

#: A model reads the first tokens of each: `hf.calibration` has their number.
TEXTS = (PROSE, KINDS, MARKUP, RAILWAY, BATTLE, HURRICANE)

#: Three articles of the same kind. Names and numbers return in them, so a model must read them exactly; plain
#: prose shows a fifth of the loss.
CHECK = """\
HMS Calder was a river gunboat of the Harcourt class, laid down at the Tolland yard in Greenock in May \
1911 and launched on 3 February 1912. She displaced 625 tons, carried two 6-inch guns and one 3-inch \
gun, and was driven by a pair of Yarrow boilers that gave her a speed of 13.5 knots on the trials off \
Skelmorlie. Her draft of 1.2 meters allowed her to follow the Irrawaddy as far as Bhamo. Lieutenant \
Commander A. J. Renwick took command in June 1912, and she left Devonport for Rangoon with her sister \
ship Tavy three weeks later. Between 1914 and 1917 Calder escorted grain convoys, shelled the batteries \
at Kut-al-Hasan and towed the burning steamer Julnar out of the channel; for this Renwick and Stoker \
Petty Officer W. Hallam received the Distinguished Service Medal. In October 1918 she ran aground near \
Amara, was refloated by the tug Sandfly and was sold at Basra for 2,350 pounds in March 1923. The bell \
of Calder hangs in St. Brannock's church at Braunton, and one of her 6-inch guns stands before the town \
hall of Amara.

Ostrovia Legnica finished the 1986-87 season in fourth place of the second division, eleven points \
behind Zagłębie Wałbrzych. Coach Bogdan Kuźmiński, who had replaced Henryk Sroka in August, used a back \
line of three with Maroń as sweeper. The club drew 1-1 at Stal Rzeszów, lost 0-3 to Wisłoka Dębica, and \
won six matches in a row from 4 April to 9 May, among them a 5-2 against Ślęza in which the striker \
Piotr Gajda scored four goals in 23 minutes. In the quarter-final of the Polish Cup Legnica met Górnik \
Zabrze before 14,800 spectators. Gajda put the hosts ahead after a corner by Maroń, Cyroń equalized with \
a free kick, and Górnik won 4-3 on penalties. Gajda left for Schalke in July 1987 for a fee of 180,000 \
marks; Kuźmiński stayed until he was dismissed in November 1988, after a 0-6 at Ślęza.

"Paper Lantern Road" is the third single from the album Tidewrack by the Welsh band Cadair, released by \
Fathom Records on 17 September 1996. The singer Nesta Prydderch wrote its words after a visit to \
Nagasaki; the guitarist Owain Trefor added the six-note figure that opens the song and returns in E \
minor before the last verse. Critics compared the arrangement for celesta, bass clarinet and brushed \
drums with the late work of Talk Talk. Melody Weekly called it "the sound of a harbor after the boats \
have gone", while Q Review found Prydderch's voice "too careful by half". The single reached number 38 \
in the United Kingdom and number 12 in Japan, where Cadair toured in the spring of 1997. Trefor said in \
2004 that the figure had been a mistake: Prydderch had asked for five notes.
"""
