# gnuplot -c plot_synthetic.gp FOLDER samples.svg
# A row of pixels for each sample: underscores light, the target blue, noise orange, what does not belong there black.
set terminal svg size 900,640 background 'white' font 'sans-serif,14' noenhanced
set output ARG2
set palette maxcolors 4 defined (0 '#eeeeee', 1 '#0072b2', 2 '#e69f00', 3 '#000000')
set cbrange [0:3]
unset colorbox
unset tics
set autoscale fix
set yrange [*:*] reverse
set multiplot layout 4,2 margins 0.14,0.98,0.03,0.90 spacing 0.02,0.02
names = 'kappa_1_64 kappa_1_8 kappa_1 kappa_8'
budgets = '1/64 1/8 1 8'
do for [row = 1:4] {
  set label 1 word(budgets, row) . (row == 1 ? ' bit' : row == 4 ? ' bits' : ' bit') at graph -0.04,0.5 right
  if (row == 1) { set title 'a Z of its own for each sample' } else { unset title }
  plot ARG1 . '/' . word(names, row) . '/own_latents.dat' matrix with image notitle
  unset label 1
  if (row == 1) { set title 'one Z for all samples' }
  plot ARG1 . '/' . word(names, row) . '/one_latent.dat' matrix with image notitle
}
unset multiplot
