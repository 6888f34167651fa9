# gnuplot -c plot_results.gp results.csv picture.svg
# Bars of eager LibTorch, ours and a copy of the logits for the vocabularies of real models, one thread. The numbers above ours
# say how many times as fast as eager it is.
set datafile separator ','
set terminal svg size 1000,780 background 'white' font 'sans-serif,14' noenhanced
set output ARG2

# Okabe and Ito's colours, which differ in lightness, too
eager_colour = '#d55e00'
our_colour = '#0072b2'
in_place_colour = '#56b4e9'
copy_colour = '#999999'

set table $machine
plot ARG1 using (strcol('processor').', '.strcol('instruction_set').', LibTorch '.strcol('libtorch')) with table if ($0 == 1)
unset table

# The models' rows of one type: model and shape, eager, ours, copy, how many times faster. Once in place, once not.
is_of(dtype, in_place) = strcol('dtype') eq dtype && column('threads') == 1 && strcol('ratio_of') eq 'baseline / ours' \
                         && strstrt(strcol('row'), 'vocabulary') > 0 && (strstrt(strcol('row'), 'in place') > 0) == in_place
model(row) = row[1:strstrt(row, ' vocabulary') - 1]
size(shape) = shape[1:strstrt(shape, 'x') - 1].' × '.shape[strstrt(shape, 'x') + 1:*]
milliseconds(name) = 1000 * column(name)

set boxwidth 0.2
set style fill solid noborder
set grid ytics linecolor '#dddddd'
set border 3
set tics nomirror out
set xtics scale 0
set xrange [-0.5:3.5]
set yrange [0:*]
set ylabel 'milliseconds' offset 2,0
set key at screen 0.5,0.95 center top horizontal maxrows 1 samplen 1.5 width -2

set multiplot layout 2,1 margins 0.08,0.99,0.08,0.84 spacing 0.17 title 'Cross entropy, forward and backward: '.$machine[1].', 1 thread; times as fast as eager'
do for [dtype in 'float32 bfloat16'] {
  set table $plain separator comma
  plot ARG1 using (model(strcol('row')).'\n'.size(strcol('shape'))):(milliseconds('baseline_median_s')): \
                  (milliseconds('ours_median_s')):(milliseconds('copy_median_s')):'ratio' with table if (is_of(dtype, 0))
  set table $in_place separator comma
  plot ARG1 using (milliseconds('ours_median_s')):'ratio' with table if (is_of(dtype, 1))
  unset table
  set title dtype
  plot $plain using 0:(0):xtic(1) with points pointtype 0 notitle, \
       $plain using ($0 - 0.3):2 with boxes linecolor rgb eager_colour title 'eager LibTorch', \
       $plain using ($0 - 0.1):3 with boxes linecolor rgb our_colour title 'ours', \
       $in_place using ($0 + 0.1):1 with boxes linecolor rgb in_place_colour title 'ours, in place', \
       $plain using ($0 + 0.3):4 with boxes linecolor rgb copy_colour title 'copy of the logits', \
       $plain using ($0 - 0.1):3:(sprintf('%.1f×', $5)) with labels offset 0,0.6 notitle, \
       $in_place using ($0 + 0.1):1:(sprintf('%.1f×', $2)) with labels offset 0,0.6 notitle
  unset key
}
unset multiplot
