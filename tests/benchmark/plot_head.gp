# gnuplot -c plot_head.gp results.csv picture.svg
# Time and memory of a step of the head and its loss, forward and backward, float32, 2 threads: bars of eager LibTorch, which
# makes the logits, and of LinearLogits, which does not. A panel for each size, as bars need an axis that starts at 0.
set datafile separator ','
set terminal svg size 1000,400 background 'white' font 'sans-serif,14' noenhanced
set output ARG2

# Okabe and Ito's colours, which differ in lightness, too
eager_colour = '#d55e00'
our_colour = '#0072b2'

set table $machine
plot ARG1 using (strcol('processor').', '.strcol('instruction_set').', LibTorch '.strcol('libtorch')) with table if ($0 == 1)
unset table

is_of(ratio) = strstrt(strcol('row'), 'LinearLogits') == 1 && strcol('baseline') eq 'linear and F::cross_entropy' \
               && strcol('dtype') eq 'float32' && column('threads') == 2 && strcol('ratio_of') eq ratio
tokens(shape) = shape[1:strstrt(shape, 'x') - 1]
classes(shape) = shape[strstrt(shape, 'x') + 1:*]
size(shape, row) = tokens(shape).' × '.classes(shape).', '.row[14:*]
# Rows of other shapes are evaluated, too, before they are dropped.
mebibytes(ratio) = is_of(ratio) ? column('ratio') * 4 * tokens(strcol('shape')) * classes(strcol('shape')) / 2**20 : 0

# One line for each size, and the same sizes in each block.
set table $sizes
plot ARG1 using (size(strcol('shape'), strcol('row'))) with table if (is_of('baseline / ours'))
set table $eager_seconds
plot ARG1 using 'baseline_median_s' with table if (is_of('baseline / ours'))
set table $our_seconds
plot ARG1 using 'ours_median_s' with table if (is_of('baseline / ours'))
set table $eager_mebibytes
plot ARG1 using (mebibytes("baseline's extra memory / logits")) with table if (is_of("baseline's extra memory / logits"))
set table $our_mebibytes
plot ARG1 using (mebibytes('extra memory / logits')) with table if (is_of('extra memory / logits'))
unset table

three_digits(x) = x < 10 ? sprintf('%.2f', x) : x < 100 ? sprintf('%.1f', x) : sprintf('%.0f', x)

set boxwidth 0.7
set style fill solid noborder
set grid ytics linecolor '#dddddd'
set border 3
set tics nomirror out font ',12'
set xtics scale 0 font ',13' ('eager' 0, 'LinearLogits' 1)
set ytics autofreq
set xrange [-0.6:1.6]
unset key

set multiplot layout 1,2*|$sizes| margins 0.05,0.985,0.08,0.74 spacing 0.06 \
    title 'Head and cross entropy, one step in float32 with 2 threads: '.$machine[1]."\n"
do for [panel = 0:2 * |$sizes| - 1] {
  line = panel / 2 + 1
  is_time = panel % 2 == 0
  eager = real(is_time ? $eager_seconds[line] : $eager_mebibytes[line])
  ours = real(is_time ? $our_seconds[line] : $our_mebibytes[line])
  set title $sizes[line]."\n".(is_time ? 'seconds' : 'MiB beside the gradients')
  set yrange [0:1.15 * (eager > ours ? eager : ours)]
  plot '+' using (0):(eager) every ::0::0 with boxes linecolor rgb eager_colour, \
       '+' using (1):(ours) every ::0::0 with boxes linecolor rgb our_colour, \
       '+' using (0):(eager):(three_digits(eager)) every ::0::0 with labels offset 0,0.6, \
       '+' using (1):(ours):(three_digits(ours)) every ::0::0 with labels offset 0,0.6
}
unset multiplot
